"""Contenders, tables and pictures of a benchmark."""
