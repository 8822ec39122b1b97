"""Pictures and clips, from files or drawn, to data folders of tokens."""
