"""Usage: records the tokens of all requests, and reports them."""
