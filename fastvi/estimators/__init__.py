"""Estimates under a fitted q."""
