"""What batchrun costs and how well it uses its time: `make bench`. Nothing here is asserted by the tests."""
