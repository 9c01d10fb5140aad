"""Drivers: one for each kind of instance. The only modules of control that import what they drive."""
