"""ObjectService and SchemaService: online reads over gRPC, as far as the principal may read."""

from __future__ import annotations

from tidelog._constraints import Constraint, constraint_from_message
from tidelog._keys import ObjectKey
from tidelog._limits import PAGE_BYTES_MAX
from tidelog._values import check_id, check_name
from tidelog.v1 import object_pb2, operation_pb2, schema_pb2
from tidelog_server._application import Application
from tidelog_server._errors import NotFound
from tidelog_server._principal import Principal
from tidelog_server._projection import Sight, matching
from tidelog_server._requests import LIST_PAGE_MAX, page_size, parsed
from tidelog_server._sealing import PageTokens
from tidelog_server._store import Store


class ObjectService:
    """The methods of the services: serialized request and principal in, response out."""

    def __init__(self, application: Application, store: Store) -> None:
        self._application = application
        self._store = store
        self._tokens = PageTokens(store, "ListObjects")

    def get_object(self, data: bytes, principal: Principal) -> object_pb2.GetObjectResponse:
        """Get one object."""
        request = parsed(object_pb2.GetObjectRequest, data)
        check_name(request.entity, "an entity name")
        check_id(request.id)
        key = (request.entity, request.id)
        with self._store.read(principal.tenant) as reader:
            state = reader.objects((key,)).get(key)
        sight = self._sight(principal, request.entity)
        seen = sight.encoded(state) if state is not None else None
        if state is None or seen is None:
            raise NotFound(f"there is no {request.entity} {request.id!r}", reason="OBJECT_NOT_FOUND")
        return object_pb2.GetObjectResponse(object=_snapshot(key, state.version, seen))

    def list_objects(self, data: bytes, principal: Principal) -> object_pb2.ListObjectsResponse:
        """List objects. Reads one page of the scan: what does not match is read too."""
        request = parsed(object_pb2.ListObjectsRequest, data)
        check_name(request.entity, "an entity name")
        scan = (principal.tenant, request.entity)
        position = self._tokens.position(request.page_token, *scan).decode()
        limit = page_size(request.page_size)
        where = constraint_from_message(request.where) if request.HasField("where") else None
        sight = self._sight(principal, request.entity, where)
        response = object_pb2.ListObjectsResponse()
        with self._store.read(principal.tenant) as reader:
            objects, has_more = reader.entity_objects(request.entity, position, LIST_PAGE_MAX, PAGE_BYTES_MAX)
        for key, state in objects:
            if len(response.objects) == limit:
                has_more = True
                break
            position = key[1]
            seen = sight.encoded(state)
            if seen is not None:
                response.objects.append(_snapshot(key, state.version, seen))
        if has_more:
            response.next_page_token = self._tokens.token(position.encode(), *scan)
        return response

    def get_schema(self, data: bytes, _principal: Principal) -> schema_pb2.GetSchemaResponse:
        """Get the application's schema."""
        parsed(schema_pb2.GetSchemaRequest, data)
        if not self._application.has_schema:
            raise NotFound("the application has no schema: everything is accepted", reason="SCHEMA_NOT_FOUND")
        return schema_pb2.GetSchemaResponse(schema=self._application.schema.to_message())

    def _sight(self, principal: Principal, entity: str, where: Constraint | None = None) -> Sight:
        return matching(self._application.schema, self._application.rights(principal), entity, where)


def _snapshot(key: ObjectKey, version: int, attributes: bytes) -> operation_pb2.Snapshot:
    return operation_pb2.Snapshot(entity=key[0], id=key[1], version=version, attributes=attributes)
