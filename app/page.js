document.addEventListener("keydown", (event) => {
  const press = (id) => { event.preventDefault(); document.getElementById(id)?.click(); };
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") press("generate");
  else if (event.key === "Escape" && document.querySelector("#status progress")) press("stop");
});
const give = (event, file, input) => {
  if (!file || !input) return false;
  event.preventDefault();
  event.stopImmediatePropagation();
  const one = new DataTransfer();
  one.items.add(file);
  input.files = one.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
  return true;
};
// the drop zones of gradio take pictures only: a word that is dropped anywhere goes to the button that opens it
document.addEventListener("drop", (event) => {
  const files = [...(event.dataTransfer?.files ?? [])];
  const word = files.find((file) => file.name.toLowerCase().endsWith(".vilex"));
  give(event, word, document.querySelector("#card-buttons input[type=file]"));
  if (word || !files.length || event.target.closest?.(".block:has(input[type=file])")) return;
  event.preventDefault();  // a browser leaves the page for a file that is dropped beside the zones
  toCard(event, files);
}, true);
// gradio's button reads the clipboard only; a picture that is pasted or dropped anywhere goes to the first empty card,
// else to A
const toCard = (event, files) => {
  const zones = [...document.querySelectorAll(".card .picture")].filter((zone) => zone.offsetParent);
  const isFree = (one) => !one.closest(".card").querySelector(".picture img, .card-note p");
  const isComing = (one) => Date.now() - (one.dataset.given ?? 0) < 2000;  // what it was given is not shown yet
  const zone = zones.find((one) => isFree(one) && !isComing(one)) ?? zones[0];
  if (zone) zone.dataset.given = Date.now();
  return give(event, files.find((file) => file.type.startsWith("image/")), zone?.querySelector("input[type=file]"));
};
// the last picture of each card that could be read: a file that is no picture leaves it there
const held = {};
window.holdPicture = (card, picture) => { held[card] = picture; };
window.heldPicture = (card) => held[card] ?? null;
// examples and picked results go where a picture that is dropped beside the zones would
const toCardFrom = async (address) => {
  const answer = await fetch(address);
  if (!answer.ok) return false;
  const content = await answer.blob();
  return toCard(new Event("taken"), [new File([content], address.split("/").pop(), { type: content.type })]);
};
window.takeExample = (index) => toCardFrom(document.querySelectorAll("#example-pictures img")[index].src);
window.takePicked = async (gallery) => {
  const picked = document.querySelector(`#${gallery} .thumbnail-lg.selected img`);
  if (!picked) return "<p>Pick a result first: click it.</p>";
  const isThere = await toCardFrom(picked.src);
  return isThere ? "<p>The result is a picture now.</p>" : "<p>This result is no longer on the server.</p>";
};
document.addEventListener("paste", (event) => toCard(event, [...(event.clipboardData?.files ?? [])]), true);
// gradio leaves without a name: example pictures, and texts whose label also holds the button that copies them
new MutationObserver(() => {
  for (const image of document.querySelectorAll("#example-pictures img[alt='']"))
    image.alt = "Example: " + image.src.split("/").pop().split(".")[0];
  for (const text of document.querySelectorAll("label:has(button) textarea:not([aria-label])"))
    text.setAttribute("aria-label", text.closest("label").querySelector("span").innerText);
  // a screen reader speaks how a job ended, not each of its steps
  const status = document.getElementById("status");
  if (status?.getAttribute("aria-live") !== "polite") status?.setAttribute("aria-live", "polite");
  const busy = String(!!status?.querySelector("progress"));
  if (status && status.getAttribute("aria-busy") !== busy) status.setAttribute("aria-busy", busy);
}).observe(document, { childList: true, subtree: true });
document.addEventListener("dragover", (event) => event.preventDefault());
