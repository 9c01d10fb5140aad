"""Drivers of instances, one for each kind. Only drivers import the packages that run instances, such as container/."""
