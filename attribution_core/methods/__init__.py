"""Attribution methods, the pipeline that fits them, and the fitted index that answers queries."""
