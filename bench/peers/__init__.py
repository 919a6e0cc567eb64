"""What others write: the scripts that batchrun is measured beside. Nothing here belongs to the product."""
