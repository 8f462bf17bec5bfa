document.addEventListener("keydown", (event) => {
  const press = (id) => { event.preventDefault(); document.getElementById(id)?.click(); };
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter") press("generate");
  else if (event.key === "Escape" && document.querySelector("#status progress")) press("stop");
});
const give = (event, file, input) => {
  if (!file || !input) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  const one = new DataTransfer();
  one.items.add(file);
  input.files = one.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
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
  give(event, files.find((file) => file.type.startsWith("image/")), zone?.querySelector("input[type=file]"));
};
// a file that is no picture leaves the card as it was before
const held = {};
window.holdPicture = (card, picture) => {
  const { now = null } = held[card] ?? {};
  if (now?.path !== picture?.path) held[card] = { now: picture, before: now };
};
window.pictureBefore = (card) => held[card]?.before ?? null;
// examples and picked results go where a picture that is dropped beside the zones would
const toCardFrom = async (address) => {
  const answer = await fetch(address);
  if (!answer.ok) return;
  const content = await answer.blob();
  toCard(new Event("taken"), [new File([content], address.split("/").pop(), { type: content.type })]);
};
window.takeExample = (index) => toCardFrom(document.querySelectorAll("#example-pictures img")[index].src);
window.takePicked = async (gallery) => {
  const picked = document.querySelector(`#${gallery} .thumbnail-lg.selected img`);
  if (!picked) return "<p>Pick a result first: click it.</p>";
  await toCardFrom(picked.src);
  return "<p>The result is a picture now.</p>";
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
