"""What an exporter hands over, and who vouches for it."""
