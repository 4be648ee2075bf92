"""Publish files to object storage and read them back verified, through pyarrow's and fsspec's filesystems."""
