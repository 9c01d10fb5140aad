// A real OpenID provider on loopback, for the tests: node provider.mjs CONFIG.json
// CONFIG: {port, jwks, clients, accounts: {NAME: claims}, audience, ttl}. Prints a line when it listens, and one for each
// request for its keys. Its forms of login and consent are those that oidc-provider has for development.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const [, , file] = process.argv;
const config = JSON.parse(readFileSync(file));
const found = createRequire(`${config.modules}/`).resolve('oidc-provider');
const { Provider } = await import(pathToFileURL(found).href);
const issuer = `http://127.0.0.1:${config.port}`;
const account = (id) => JSON.parse(readFileSync(file)).accounts[id] ?? {};  // as the file says now

const provider = new Provider(issuer, {
  clients: config.clients,
  jwks: config.jwks,
  cookies: { keys: ['for tests'] },
  claims: { openid: ['sub'], profile: ['name'], groups: ['groups', '_claim_names', '_claim_sources', 'hasgroups'] },
  scopes: ['openid', 'profile', 'groups', 'offline_access'],
  conformIdTokenClaims: false,
  findAccount: (ctx, id) => ({ accountId: id, claims: async () => ({ sub: id, ...account(id) }) }),
  extraTokenClaims: (ctx, token) => ({ ...account(token.accountId) }),
  issueRefreshToken: async (ctx, client) => client.grantTypeAllowed('refresh_token'),
  rotateRefreshToken: true,
  pkce: { required: () => true },
  ttl: { AccessToken: config.ttl, IdToken: config.ttl, DeviceCode: 600, RefreshToken: 3600, Grant: 3600, Session: 3600, Interaction: 600 },
  features: {
    deviceFlow: { enabled: true },
    revocation: { enabled: true },
    devInteractions: { enabled: true },
    resourceIndicators: {
      enabled: true,
      useGrantedResource: async () => true,
      getResourceServerInfo: async (ctx, resource) => ({ scope: '', audience: resource, accessTokenFormat: 'jwt', jwt: { sign: { alg: config.jwks.keys[0].alg } } }),
    },
  },
  enabledJWA: { idTokenSigningAlgValues: ['RS256', 'PS256', 'ES256', 'EdDSA'] },
});
provider.use(async (ctx, next) => {
  if (ctx.path === '/jwks') console.log('keys fetched');
  await next();
});
provider.listen(config.port, '127.0.0.1', () => console.log('listening'));
