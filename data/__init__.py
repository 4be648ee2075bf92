"""Data rows that travel with an installation as the package `harvester_data`: terms, teachers, the format."""
