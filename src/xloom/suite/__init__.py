"""The built-in suite: domains with small data sets that come inside packages; no model hub is needed."""
