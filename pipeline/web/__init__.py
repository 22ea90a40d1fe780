"""Web pages that are served to this machine only: the parts that wsi-view and wsi-label share."""
