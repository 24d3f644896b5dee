"""`pkd report`: one page about a run or a study; command.py is where it begins."""
