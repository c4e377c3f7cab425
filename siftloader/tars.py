"""Shards that others wrote: tars of any layout, read through webdataset's own pipeline."""
