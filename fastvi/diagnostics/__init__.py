"""What a careful reader notices in a run: findings and figures."""
