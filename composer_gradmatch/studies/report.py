"""placeholder"""



def write_report(store, study, name):
    store.write_table(study, "results.csv")
    p = store.folder / "summary.md"
    p.write_text("x")
    return p
