"""Speculative decoding with many drafts: how often drafts can be accepted, and the rules that accept them."""
