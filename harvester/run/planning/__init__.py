"""What a harvest would do, cost and take: `harvester plan`."""
