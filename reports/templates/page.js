// A link to a cell opens its line; printing opens what matters and closes it again.
function openTarget() {
  const target = location.hash && document.getElementById(location.hash.slice(1));
  if (!target || target.tagName !== "DETAILS") return;
  for (let box = target; box; box = box.parentElement.closest("details")) box.open = true;
  target.scrollIntoView();
}
addEventListener("hashchange", openTarget);
openTarget();
