"""What the adaptation bought: retrieval, zero-shot classification, report and figures."""
