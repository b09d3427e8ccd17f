// Where a box is wider than the screen, its edge fades on the side where more is to come (custom.css), and the arrow keys move it.
(() => {
  const boxes = ".bd-article pre, .bd-article mjx-container[display=true], .bd-article .pst-scrollable-table-container, " +
    ".bd-article .cell_output, .bd-article .cell_output .output";
  const mark = box => {
    const more = box.scrollWidth - box.clientWidth;
    const wide = more > 2 && ["auto", "scroll"].includes(getComputedStyle(box).overflowX);
    box.classList.toggle("more-left", wide && box.scrollLeft > 2);
    box.classList.toggle("more-right", wide && box.scrollLeft < more - 2);
    if (wide) box.tabIndex = 0;
  };
  const known = new WeakSet();
  const sizes = new ResizeObserver(found => found.forEach(({target}) => mark(target)));
  const look = () => document.querySelectorAll(boxes).forEach(box => {
    if (known.has(box)) return mark(box);
    known.add(box);
    sizes.observe(box);
    box.addEventListener("scroll", () => mark(box), {passive: true});
  });
  addEventListener("load", () => {
    look();
    window.MathJax?.startup?.promise?.then(look);   // formulas are boxes once they are set
  });
  addEventListener("resize", look);
})();

// Paper is white: a dark page is printed as a light one.
(() => {
  const page = document.documentElement;
  let theme;
  addEventListener("beforeprint", () => { theme = page.dataset.theme; page.dataset.theme = "light"; });
  addEventListener("afterprint", () => { page.dataset.theme = theme; });
})();
