// This file has the type of values that must never be printed, and the encryption of provider keys and of the content
// of calls at rest. It may not log, and it uses no table and no URL.
package main

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
)

// A secret is a string that printing, logging or encoding cannot reveal. It is a func because
// fmt prints a func as an address even in unexported fields, where it calls no methods.
// Calling a secret returns the value; layout_test.go lists every call for reviewers. The nil
// secret is "not set".
type secret func() string

const hiddenSecret = "[secret]"

func newSecret(s string) secret { return func() string { return s } }

func (secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(hiddenSecret)) }

func (secret) LogValue() slog.Value { return slog.StringValue(hiddenSecret) }

func (secret) MarshalText() ([]byte, error) { return []byte(hiddenSecret), nil }

func (secret) MarshalJSON() ([]byte, error) { return []byte(`"` + hiddenSecret + `"`), nil }

// UnmarshalJSON reads a secret from a request body.
func (s *secret) UnmarshalJSON(b []byte) error {
	var v string
	if err := json.Unmarshal(b, &v); err != nil {
		return err
	}
	*s = newSecret(v)
	return nil
}

// hint returns the last 4 characters of a key, so that people can tell keys apart, or nothing
// if the key is so short that 4 characters would reveal too much.
func (s secret) hint() string {
	v := s()
	if len(v) < 20 {
		return ""
	}
	return v[len(v)-4:]
}

var errUnseal = errors.New(
	"a stored secret cannot be decrypted: wrong encryption key, or the row was changed outside the program")

// A sealer encrypts provider keys with AES-256-GCM under a key derived from the
// operator's encryption key. A sealed value is
//
//	version (1) | key id (8) | nonce (12) | ciphertext and tag
//
// The nonce is random: one key is safe for far more values than any installation has. The key
// id tells values with the old key from values with the new one during a rekey.
type sealer struct {
	aead    cipher.AEAD
	kid     [8]byte
	hashKey [sha256.Size]byte // of the hashes of what clients send; it encrypts nothing
}

const sealVersion = 1

// newSealer derives its keys from master, 32 bytes.
func newSealer(master []byte) (*sealer, error) {
	if len(master) != 32 {
		return nil, fmt.Errorf("an encryption key must have 32 bytes, not %d", len(master))
	}
	key, err := hkdf.Key(sha256.New, master, nil, "llm-proxy seal v1", 32)
	if err != nil {
		return nil, fmt.Errorf("deriving the sealing key: %w", err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, fmt.Errorf("creating the cipher: %w", err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("creating the cipher: %w", err)
	}
	s := &sealer{aead: aead}
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte("llm-proxy key id v1"))
	copy(s.kid[:], mac.Sum(nil))
	mac.Reset()
	mac.Write([]byte("llm-proxy affinity v1"))
	copy(s.hashKey[:], mac.Sum(nil))
	return s, nil
}

// seal encrypts plain. Only open with the same context decrypts it, so a ciphertext cannot be
// moved to another row or used for another host.
func (s *sealer) seal(plain secret, context string) []byte {
	out := make([]byte, 0, 1+len(s.kid)+s.aead.NonceSize()+len(plain())+s.aead.Overhead())
	out = append(out, sealVersion)
	out = append(out, s.kid[:]...)
	nonce := make([]byte, s.aead.NonceSize())
	rand.Read(nonce) // never fails: crypto/rand ends the program instead
	out = append(out, nonce...)
	return s.aead.Seal(out, nonce, []byte(plain()), []byte(context))
}

// open decrypts a value from seal. Every failure is errUnseal: there is no fallback to
// plaintext and no detail about the cause.
func (s *sealer) open(sealed []byte, context string) (secret, error) {
	head := 1 + len(s.kid)
	if len(sealed) < head+s.aead.NonceSize()+s.aead.Overhead() ||
		sealed[0] != sealVersion || !hmac.Equal(sealed[1:head], s.kid[:]) {
		return nil, errUnseal
	}
	nonce, rest := sealed[head:head+s.aead.NonceSize()], sealed[head+s.aead.NonceSize():]
	plain, err := s.aead.Open(nil, nonce, rest, []byte(context))
	if err != nil {
		return nil, errUnseal
	}
	return newSecret(string(plain)), nil
}

// id returns the id of the sealer's key, as keyID does.
func (s *sealer) id() string { return hex.EncodeToString(s.kid[:]) }

// keyID returns the id of the key that a value was encrypted with. It reveals nothing about
// the key.
func keyID(sealed []byte) string {
	if len(sealed) < 1+8 {
		return "unknown"
	}
	return hex.EncodeToString(sealed[1 : 1+8])
}

// sealContext binds a provider key to its row, its project and the origin it is sent to. To
// change the base URL, the administrator must therefore enter the key again.
func sealContext(upstreamID, projectID, origin string) string {
	return "llm-proxy upstream v1|" + upstreamID + "|" + projectID + "|" + origin
}

// parseEncryptionKey reads a 32-byte key as 64 hexadecimal digits or base64.
func parseEncryptionKey(text string) ([]byte, error) {
	text = strings.TrimSpace(text)
	for _, decode := range []func(string) ([]byte, error){
		hex.DecodeString, base64.StdEncoding.DecodeString, base64.RawStdEncoding.DecodeString,
		base64.URLEncoding.DecodeString, base64.RawURLEncoding.DecodeString,
	} {
		if key, err := decode(text); err == nil && len(key) == 32 {
			if weakKey(key) {
				return nil, errors.New("is a pattern, not a random key; create one with: openssl rand -hex 32")
			}
			return key, nil
		}
	}
	return nil, errors.New("must be 32 random bytes as 64 hex digits or base64; create one with: openssl rand -hex 32")
}

// weakKey reports whether key has so few different bytes, or such a regular pattern, that it
// is not random. (A random key has fewer than 16 different bytes once in 10^12.)
func weakKey(key []byte) bool {
	seen := map[byte]bool{}
	for _, b := range key {
		seen[b] = true
	}
	if len(seen) < 16 {
		return true
	}
	step := key[1] - key[0] // 00 01 02 …, as in documentation
	for i := 1; i < len(key); i++ {
		if key[i]-key[i-1] != step {
			return false
		}
	}
	return true
}

// newEncryptionKey returns a new random key as text for a key file.
func newEncryptionKey() secret {
	key := make([]byte, 32)
	rand.Read(key)
	return newSecret(hex.EncodeToString(key))
}

const auditKeyContext = "llm-proxy audit key v1"

const (
	contentKeySetting = "content_key"
	contentKeyContext = "llm-proxy content key v1"
)

// A contentKey seals stored content. Each call gets a key of its own, derived from the root key: the number of
// calls is not bounded, and one AES-GCM key is safe for a bounded number of messages only. The root key is random
// and is sealed with the encryption key, so that changing the latter leaves stored content as it is.
type contentKey struct{ root secret }

// derive returns 32 bytes for one purpose.
func (k *contentKey) derive(purpose string) ([]byte, error) {
	key, err := hkdf.Key(sha256.New, []byte(k.root()), nil, "llm-proxy "+purpose, 32)
	if err != nil {
		return nil, fmt.Errorf("deriving a content key: %w", err)
	}
	return key, nil
}

// sealerFor returns the sealer for one purpose: the content of one call, or one cached answer.
func (k *contentKey) sealerFor(purpose string) (*sealer, error) {
	key, err := k.derive(purpose)
	if err != nil {
		return nil, err
	}
	return newSealer(key)
}

func contentPurpose(callID int64) string { return "content v1|" + formatRequestID(callID) }

// sealCached encrypts a cached answer. Only openCached with the same context, which names the project and the cache
// key, decrypts it.
func (k *contentKey) sealCached(context string, plain []byte) ([]byte, error) {
	sl, err := k.sealerFor("cache v1|" + context)
	if err != nil {
		return nil, err
	}
	return sl.seal(newSecret(string(plain)), context), nil
}

// openCached decrypts a value from sealCached.
func (k *contentKey) openCached(context string, sealed []byte) ([]byte, error) {
	sl, err := k.sealerFor("cache v1|" + context)
	if err != nil {
		return nil, err
	}
	plain, err := sl.open(sealed, context)
	if err != nil {
		return nil, err
	}
	return []byte(plain()), nil
}

// hashEndUser returns the name under which an end user is recorded in a project whose policy asks for hashes: nobody
// can try names without the root key, and changing the encryption key leaves it as it is.
func (k *contentKey) hashEndUser(project, name string) (string, error) {
	key, err := k.derive("end users v1|" + project)
	if err != nil {
		return "", err
	}
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(name))
	return endUserHashPrefix + hex.EncodeToString(mac.Sum(nil)[:16]), nil
}

const (
	requestPart  = "request"
	responsePart = "answer"
)

// open returns both bodies of a row in clear.
func (k *contentKey) open(row *contentRow) (request, answer secret, err error) {
	sl, err := k.sealerFor(contentPurpose(row.id))
	if err != nil {
		return nil, nil, err
	}
	if request, err = sl.open(row.request, requestPart); err != nil {
		return nil, nil, err
	}
	answer, err = sl.open(row.response, responsePart)
	return request, answer, err
}

// The parts of a webhook that are sealed. The URL is, because it is often a credential itself.
const (
	webhookURLPart       = "url"
	webhookSecretPart    = "secret"
	webhookOldSecretPart = "old secret"
)

// webhookContext binds a sealed part of a webhook to its row.
func webhookContext(id, part string) string { return "llm-proxy webhook v1|" + id + "|" + part }

const webhookSecretPrefix = "whsec_"

// newWebhookSecret returns a new secret in the form of Standard Webhooks: whsec_ and 32 random bytes as base64.
func newWebhookSecret() secret {
	key := make([]byte, 32)
	rand.Read(key)
	return newSecret(webhookSecretPrefix + base64.StdEncoding.EncodeToString(key))
}

// signWebhook returns the header webhook-signature of a message: a signature with each secret, so that receivers may
// have either during a rotation.
func signWebhook(secrets []secret, id, timestamp string, body []byte) (string, error) {
	var signatures []string
	for _, s := range secrets {
		key, err := base64.StdEncoding.DecodeString(strings.TrimPrefix(s(), webhookSecretPrefix))
		if err != nil {
			return "", errUnseal
		}
		mac := hmac.New(sha256.New, key)
		mac.Write([]byte(id + "." + timestamp + "."))
		mac.Write(body)
		signatures = append(signatures, "v1,"+base64.StdEncoding.EncodeToString(mac.Sum(nil)))
	}
	return strings.Join(signatures, " "), nil
}
