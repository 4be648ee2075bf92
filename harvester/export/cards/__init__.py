"""Write the documents of a data set: card, Croissant metadata and NOTICE. No I/O."""
