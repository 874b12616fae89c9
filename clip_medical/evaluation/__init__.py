"""Evaluation before and after adaptation: retrieval, zero-shot classification, search, report and figures."""
