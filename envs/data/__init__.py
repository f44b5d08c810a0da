"""From the files that people have to checked records: instruction JSON, media, rendered pictures."""
