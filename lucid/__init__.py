"""Lucid API Gateway: the only door to the platform's services."""

__version__ = "0.1.0"
SERVICE_NAME = "api-gateway"
