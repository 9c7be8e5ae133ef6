"""Objectives that several methods descend."""
