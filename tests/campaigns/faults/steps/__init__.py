"""Every command ended, or failed, at every call by which it changes a file. See `campaign.py`."""
