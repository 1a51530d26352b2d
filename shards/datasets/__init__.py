"""One reader per data set: a folder and its label files become a `DataSet`."""
