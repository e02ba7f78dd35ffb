// Two small helps: wide tables scroll inside their own box, and the method table can be filtered.
document.querySelectorAll("article table").forEach((table) => {
  if (table.closest(".dl-scroll, .pst-scrollable-table-container, .output")) return;
  const box = document.createElement("div");
  box.className = "dl-scroll";
  table.replaceWith(box);
  box.append(table);
});

document.querySelectorAll(".dl-filter").forEach((box) => {
  const rows = [...box.querySelectorAll("tbody tr")];
  if (rows.length < 4) return;
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = `Filter ${rows.length} methods: name, family, paper, year`;
  field.setAttribute("aria-label", "Filter the methods");
  field.className = "dl-field";
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    rows.forEach((row) => { row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word)); });
  });
  box.prepend(field);
});
