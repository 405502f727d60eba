-- Rows that grant something are bound by a MAC, with the key of the audit trail
-- (store_audit.go): whoever writes to the database without the encryption key
-- can neither add such a row nor change one. bound_by is the seq of the audit
-- entry of the change that wrote the row: a row that was put back is older than
-- a later entry about it. mac is empty in a row that grants nothing, such as a
-- revoked token. The first start with this version binds what it finds.
ALTER TABLE tokens ADD COLUMN bound_by INTEGER NOT NULL DEFAULT 0;
ALTER TABLE tokens ADD COLUMN mac BLOB NOT NULL DEFAULT x'';
ALTER TABLE management_keys ADD COLUMN bound_by INTEGER NOT NULL DEFAULT 0;
ALTER TABLE management_keys ADD COLUMN mac BLOB NOT NULL DEFAULT x'';
ALTER TABLE projects ADD COLUMN bound_by INTEGER NOT NULL DEFAULT 0;
ALTER TABLE projects ADD COLUMN mac BLOB NOT NULL DEFAULT x'';
ALTER TABLE upstreams ADD COLUMN bound_by INTEGER NOT NULL DEFAULT 0;
ALTER TABLE upstreams ADD COLUMN mac BLOB NOT NULL DEFAULT x'';
ALTER TABLE upstream_shares ADD COLUMN bound_by INTEGER NOT NULL DEFAULT 0;
ALTER TABLE upstream_shares ADD COLUMN mac BLOB NOT NULL DEFAULT x'';
ALTER TABLE sessions ADD COLUMN bound_by INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sessions ADD COLUMN mac BLOB NOT NULL DEFAULT x'';
DELETE FROM sessions; -- whoever was signed in signs in again
