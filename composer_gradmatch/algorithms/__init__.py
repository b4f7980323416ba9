"""What goes into ``Trainer(algorithms=[...])``: the only folder that knows Composer's events."""
