"""``python -m composer_gradmatch.train``: see :mod:`.command`."""

import sys

from composer_gradmatch.train.command import main

if __name__ == "__main__":
    sys.exit(main())
