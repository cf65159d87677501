"""The paper's datasets, from the files that their publishers distribute to nnU-Net's raw format."""
