"""Does selection pay on my model? The paper's questions on a user's own YAML.

``python -m composer_gradmatch.studies accuracy|learning-rate|gradient-error|step-time CONFIG --out DIR``
"""
