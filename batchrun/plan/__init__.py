"""From a manifest to the rows of a run: everything is read, bound and found right before anything is sent."""
