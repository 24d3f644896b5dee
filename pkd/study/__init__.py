"""`pkd study`: a recipe against its controls, arms by seeds; command.py is where it begins."""
