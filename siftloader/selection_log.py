"""What every pool decided, as a folder of Parquet files that any reader takes as one table."""
