// Starts Swagger UI on this service's own description; nothing is asked of another host. Addresses are relative, here and in
// the pages, so that they are right under any prefix that a proxy adds.

document.documentElement.classList.toggle("dark-mode", matchMedia("(prefers-color-scheme: dark)").matches);

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null, // else a badge of another host's
  tryItOutEnabled: true,
  displayRequestDuration: true,
  defaultModelsExpandDepth: 0,
});
