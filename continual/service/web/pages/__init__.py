"""The pages for people: what each shows and how it is written. They are made of frozen records, and ask nobody."""
