// Sort tables by a click on a column, and show the rows and images of some classes only.
const number = (cell) => {
  const value = Number.parseFloat(cell.textContent.replaceAll(",", ""));
  return Number.isNaN(value) ? -Infinity : value;
};

for (const table of document.querySelectorAll("table.sortable")) {
  for (const [index, head] of [...table.tHead.rows[0].cells].entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const ascending = head.ariaSort !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const compare = (one, other) => {
        const [a, b] = [one.cells[index], other.cells[index]];
        return head.classList.contains("text") ? a.textContent.localeCompare(b.textContent) : number(a) - number(b);
      };
      const rows = [...table.tBodies[0].rows].sort((one, other) => (ascending ? 1 : -1) * compare(one, other));
      table.tBodies[0].append(...rows);
    });
  }
}

// A tab stop only where there is something to scroll.
const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
    else target.removeAttribute("tabindex");
  }
});
for (const region of document.querySelectorAll(".scroll, pre")) resized.observe(region);

const filter = document.getElementById("filter");
if (filter) {
  filter.closest(".filter").hidden = false;
  filter.addEventListener("input", () => {
    const wanted = filter.value.trim().toLocaleLowerCase();
    let shown = 0;
    for (const item of document.querySelectorAll("[data-classes]")) {
      const names = JSON.parse(item.dataset.classes);
      item.hidden = wanted !== "" && !names.some((name) => name.toLocaleLowerCase().includes(wanted));
      if (!item.hidden && item.tagName === "TR") shown += 1;
    }
    for (const details of document.querySelectorAll("details[data-filtered]")) details.open ||= wanted !== "";
    document.getElementById("found").textContent = wanted === "" ? "" : shown === 1 ? "1 class" : `${shown} classes`;
  });
}
