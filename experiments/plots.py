def draw_run(path, summary, records, subnet, masks):
    pass
