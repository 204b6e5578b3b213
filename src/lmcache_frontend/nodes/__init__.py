"""The nodes of the cluster: what they are and where they are kept."""
