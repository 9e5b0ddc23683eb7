"use strict";
window.addEventListener("load", () => {
  const swagger = document.getElementById("swagger-ui");
  if (swagger) {
    SwaggerUIBundle({ url: "/openapi.json", dom_id: "#swagger-ui", deepLinking: true, tryItOutEnabled: true, validatorUrl: null });
  }
  const redoc = document.getElementById("redoc");
  if (redoc) {
    Redoc.init("/openapi.json", { disableSearch: true, hideDownloadButtons: false, theme: { typography: { fontFamily: "sans-serif" } } }, redoc);
  }
});
