"""Studies: several commands on one data set, and the pages and tables with their figures."""
