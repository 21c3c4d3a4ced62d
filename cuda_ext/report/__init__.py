"""What can be known of each kernel without a GPU, and an estimate of its time: `python -m cuda_ext.report --help`."""
