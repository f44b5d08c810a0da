"""Several commands on one data set, and the pages and tables they fill."""
