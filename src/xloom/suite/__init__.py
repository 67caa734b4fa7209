"""The built-in suite: a small base and small data sets that come inside packages; no model hub is needed."""
