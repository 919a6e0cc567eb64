"""What a user would write instead: it stands beside batchrun in the measurements."""
