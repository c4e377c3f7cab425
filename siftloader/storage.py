"""Where the files of a data set are: a folder, or behind a URL with verified copies on this machine."""
